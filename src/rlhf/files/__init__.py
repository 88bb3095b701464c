"""Files and folders: where they are, who may write to them, and how they survive a crash."""
