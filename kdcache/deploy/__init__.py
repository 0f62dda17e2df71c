"""After training: scoring students, predicting with them, exporting them, and what they cost."""
