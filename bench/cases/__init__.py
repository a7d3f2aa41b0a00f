"""The questions. Each module has `cases(device, quick) -> Iterator[Case]`, inputs made when the
case is asked."""
