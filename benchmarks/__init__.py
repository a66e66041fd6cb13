"""How good and how fast the guard is: attacks, suspects, evaluation. Nothing imports this package."""
