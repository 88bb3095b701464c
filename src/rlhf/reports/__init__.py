"""What is told to people: the dry run, the model card, the check of data."""
