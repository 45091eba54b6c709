"""The method: Markovian RSA and its lazy evaluation, knowing neither HTTP nor any engine."""
