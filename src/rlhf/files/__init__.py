"""Files and folders: where they are, who may write them, and how they survive a crash."""
