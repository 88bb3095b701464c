"""The embedded corpus, the small models, and the run that uses both."""
