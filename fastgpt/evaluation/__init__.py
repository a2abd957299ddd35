"""How good a model is: its loss on a text, and its score on tasks."""
