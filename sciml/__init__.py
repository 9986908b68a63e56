"""DPOT fine-tuned with TB_Sigmoid and FARMS on compressible Navier-Stokes data."""
