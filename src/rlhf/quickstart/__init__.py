"""The built-in corpus, the small models, and the run that uses both."""
