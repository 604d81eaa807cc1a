"""`python -m gem_st.cli`."""

from . import app

app()
