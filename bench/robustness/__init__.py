"""Whether runs survive what happens to them: :mod:`soak` kills them, :mod:`corruption` damages their files."""
