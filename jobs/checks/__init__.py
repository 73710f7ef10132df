"""What `karikomi doctor` looks at: small functions, each of which gives findings and breaks nothing."""
