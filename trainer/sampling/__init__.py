"""How rollouts are drawn."""
