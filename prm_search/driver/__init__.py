"""The search driver: ask/tell core, sync and async loops, budgets, settings and results. No torch."""
