"""What several tests need: real servers, a fault proxy, a scripted server, checkpoints."""
