"""Pages that show search trees: what they are made of here, what runs in the browser in `static`, built of `frontend/`.

A page is one file that loads nothing: its data, its style and its script stand in it.
"""
