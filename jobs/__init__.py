"""Who asks for it: job files and the command line."""
