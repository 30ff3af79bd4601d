"""Admission: a model family is served only where its packed forward equals its plain one."""
