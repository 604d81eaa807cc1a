"""`python -m gem_st.cli`."""

from .app import app

app()
