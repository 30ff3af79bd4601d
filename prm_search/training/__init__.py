"""Implicit PRMs from outcome labels: rollouts, objectives, the trainer, updates online.

Importing this package imports nothing; its modules say what they need (the extra `train`: peft, accelerate, datasets).
"""
