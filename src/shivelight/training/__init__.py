"""What training adds to routing: gradients through the selection, losses, data and the stages.

Import from the modules themselves: inference never loads this package.
"""
