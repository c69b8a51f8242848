"""The web page: `page.py` lays it out, `session.py` does what it asks, the rest turns inputs into tensors."""
