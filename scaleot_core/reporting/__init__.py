"""What was measured, as a person sees it: gap and recovery, tables, CSV, pictures, the HTML report."""
