"""The one place where the version is written. It is part of every step's key."""

VERSION = "0.1.0"
