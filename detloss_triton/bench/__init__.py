"""What `detloss bench` and `pytest bench` share: inputs, providers, peers, measurement, reports."""
