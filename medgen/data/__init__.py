"""Reading, placing and writing of scans: geometry, intensities, files, data sets and exports."""
