"""Lightning callbacks: they decide when; the packages below know how."""
