"""What scanners, cameras and files do to a scan: one file per kind of physics.

Every function here takes and gives a signal, ``(C, H, W[, D])`` float32 that is 0 where there is none and about 1 where
the scan is bright (:mod:`medgen.transforms.physics.signal`), and draws only from the generator that it is given.
"""
