"""What a pass on a slice costs, and what it costs to keep what the pass stores.

Imports nothing heavy: the parser shows the prices. Where they are from is said in
README_DISTRIBUTED_INFERENCE.md.
"""

from typing import Any

# List prices in US dollars, on demand. They change: see --usd_per_chip_hour, --usd_per_gb_month.
CHIP_HOUR = {"v4": 3.22, "v5e": 1.20, "v5p": 4.20, "v6e": 2.70}
GB_MONTH = 0.020
CHIP_HOUR_HELP = (
    "price of a chip for an hour, in US dollars, for the cost of the pass (default: the list price "
    f"on demand in the US: {', '.join(f'{chip} {usd:.2f}' for chip, usd in CHIP_HOUR.items())}; v4 "
    "in us-central2 in August 2022, v6e in December 2024, v5e and v5p as others quote them)"
)
GB_MONTH_HELP = (
    "price of a gigabyte (10^9 bytes) in a bucket for a month, in US dollars (default: "
    f"{GB_MONTH:.3f}, Google Cloud Storage, class Standard, us-central1, in December 2022)"
)


def costs(
    estimated: dict[str, Any], usd_per_chip_hour: float | None, usd_per_gb_month: float | None
) -> dict[str, Any]:
    """The plan with its prices and costs, in US dollars; a price of None is the default.

    estimated: `slice`, `devices` (chips), `estimated_hours` (None where the run does not fit), and
    `storage` with its `bytes_total`.
    """
    chip_hour, gb_month = usd_per_chip_hour, usd_per_gb_month
    if chip_hour is None:
        chip_hour = CHIP_HOUR[estimated["slice"].partition("-")[0]]
    if gb_month is None:
        gb_month = GB_MONTH
    hours, storage = estimated["estimated_hours"], estimated["storage"]
    month = storage["bytes_total"] / 1e9 * gb_month
    usd = None if hours is None else hours * estimated["devices"] * chip_hour
    return {
        **estimated,
        "prices": {"usd_per_chip_hour": chip_hour, "usd_per_gb_month": gb_month},
        "usd": usd,
        "storage": {**storage, "usd_per_month": month},
        "passes_per_month_at_which_storing_pays": month / usd if usd and month else None,
    }
