"""The training demo behind `detloss train`: a small detector, its data, its pictures."""
