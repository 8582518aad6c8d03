"""The version, importable without anything heavy."""

VERSION = "0.1.0"
