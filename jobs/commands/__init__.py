"""The command line's commands, a file for each group; torch and ray are imported inside a command, never above it."""
