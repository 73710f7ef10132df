"""JSON, Parquet and one HTML page."""
