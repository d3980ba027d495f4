"""What a scan is generated from: masks, their deformations, and the object that carries them to the network."""
