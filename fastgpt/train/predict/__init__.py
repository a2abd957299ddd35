"""The model of the step, held to what others have measured: points, their programs as calls, the fit and its error."""
