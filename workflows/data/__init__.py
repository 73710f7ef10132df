"""Text becomes token windows."""
