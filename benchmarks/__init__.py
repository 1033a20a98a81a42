"""What a step costs, by pytest-benchmark (`make bench`). Figures are ratios of one run: machines drift (section 6)."""
