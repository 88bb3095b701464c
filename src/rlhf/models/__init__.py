"""Language models, their adapters, heads and roles, and how they are loaded and saved."""
