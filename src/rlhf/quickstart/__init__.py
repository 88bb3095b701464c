"""The embedded corpus, the small models, and the run on both."""
