"""What an attacker makes of what crosses between the parties: the package on one side, the adapter on the other."""
