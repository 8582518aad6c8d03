"""Callbacks for other training frameworks; imported only when used."""
