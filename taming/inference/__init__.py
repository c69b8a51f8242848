"""What commands and the page share: conditions from user input, many processes, provenance."""
