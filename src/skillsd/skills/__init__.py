"""Skills: how they are written, checked, stored and picked. No torch."""
