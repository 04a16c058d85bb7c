"""A row of any form that people bring: its columns in, a comparison out. forms.py lists the forms."""
