"""Reports for people: the model card and the data check."""
