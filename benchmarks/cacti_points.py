"""Run CACTI 7 over SRAM banks of many sizes and write the points of ``sim/sram_points.json``.

    python benchmarks/cacti_points.py CACTI_FOLDER sim/sram_points.json

CACTI_FOLDER holds the program ``cacti`` and its folder ``tech_params``: a build of github.com/HewlettPackard/cacti, or
``zigzag/cacti/cacti_master`` of the Python package zigzag-dse (3.9.1 was used). The published points of the file are
kept as they are. About two minutes on two cores.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CONFIGURATION = """\
-size (bytes) {bank_bytes}
-block size (bytes) {block_bytes}
-output/input bus width {width_bits}
-associativity 1
-read-write port 0
-exclusive read port 1
-exclusive write port 1
-single ended read ports 0
-UCA bank count 1
-technology (u) 0.028
-cache type "ram"
-operating temperature (K) 360
-Data array cell type - "itrs-hp"
-Data array peripheral type - "itrs-hp"
-Tag array cell type - "itrs-hp"
-Tag array peripheral type - "itrs-hp"
-tag size (b) "default"
-access mode (normal, sequential, fast) - "normal"
-design objective (weight delay, dynamic power, leakage power, cycle time, area) 0:0:0:100:0
-deviate (delay, dynamic power, leakage power, cycle time, area) 20:100000:100000:100000:100000
-NUCAdesign objective (weight delay, dynamic power, leakage power, cycle time, area) 100:100:0:0:100
-NUCAdeviate (delay, dynamic power, leakage power, cycle time, area) 10:10000:10000:10000:10000
-Optimize ED or ED^2 (ED, ED^2, NONE): "ED^2"
-Cache model (NUCA, UCA)  - "UCA"
-NUCA bank count 0
-Wire signaling (fullswing, lowswing, default) - "Global_30"
-Wire inside mat - "semi-global"
-Wire outside mat - "semi-global"
-Interconnect projection - "conservative"
-Core count 8
-Cache level (L2/L3) - "L3"
-Add ECC - "true"
-Array Power Gating - "false"
-WL Power Gating - "false"
-CL Power Gating - "false"
-Bitline floating - "false"
-Interconnect Power Gating - "false"
-Power Gating Performance Loss 0.01
-page size (bits) 8192
-burst length 8
-internal prefetch width 8
-Print level (DETAILED, CONCISE) - "DETAILED"
-Print input parameters - "true"
-Force cache config - "false"
-Ndwl 1
-Ndbl 1
-Nspd 0
-Ndcm 1
-Ndsam1 0
-Ndsam2 0
-dram_type "DDR3"
-io state "WRITE"
-addr_timing 1.0
-mem_density 4 Gb
-bus_freq 800 MHz
-duty_cycle 1.0
-activity_dq 1.0
-activity_ca 0.5
-num_dq 72
-num_dqs 18
-num_ca 25
-num_clk  2
-num_mem_dq 2
-mem_data_width 8
-rtt_value 10000
-ron_value 34
-tflight_value
-num_bobs 1
-capacity 80
-num_channels_per_bob 1
-first metric "Cost"
-second metric "Bandwidth"
-third metric "Energy"
-DIMM model "ALL"
-mirror_in_bob "F"
"""

BANK_BYTES = tuple(1 << exponent for exponent in range(10, 23))
WIDTH_BITS = (16, 32, 64, 128, 256, 512)
PUBLISHED_WIDTHS_BITS = (18, 24, 36, 48, 72)  # with 64 KiB, beside those above
BETWEEN_POWERS_BYTES = tuple(3 << exponent for exponent in range(12, 20))  # with 64 and 128 bits


def run_cacti(folder: Path, bank_bytes: int, width_bits: int) -> list[float] | None:
    """[bank bytes, width in bits, read pJ, write pJ, mm2, ns, mW], or None where CACTI finds no organization."""
    text = CONFIGURATION.format(bank_bytes=bank_bytes, width_bits=width_bits, block_bytes=-(-width_bits // 8))
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "bank.cfg"
        file.write_text(text, encoding="utf-8")
        subprocess.run(["./cacti", "-infile", str(file)], cwd=folder, capture_output=True, timeout=300, check=False)
        result = Path(f"{file}.out")
        if not result.is_file():
            return None
        names, values = list(csv.reader(result.read_text(encoding="utf-8").splitlines()))[:2]
    row = dict(zip((name.strip() for name in names), values, strict=False))
    return [
        bank_bytes,
        width_bits,
        round(float(row["Dynamic read energy (nJ)"]) * 1000, 6),
        round(float(row["Dynamic write energy (nJ)"]) * 1000, 6),
        float(row["Area (mm2)"]),
        float(row["Access time (ns)"]),
        float(row["Standby leakage per bank(mW)"]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cacti_folder", type=Path)
    parser.add_argument("points_file", type=Path)
    arguments = parser.parse_args()
    banks = [(size, width) for size in BANK_BYTES for width in WIDTH_BITS]
    banks += [(65536, width) for width in PUBLISHED_WIDTHS_BITS]
    banks += [(size, width) for size in BETWEEN_POWERS_BYTES for width in (64, 128)]
    with ThreadPoolExecutor(2) as pool:
        rows = list(pool.map(lambda bank: run_cacti(arguments.cacti_folder, *bank), banks))
    document = json.loads(arguments.points_file.read_text(encoding="utf-8"))
    document["banks"] = sorted(row for row in rows if row is not None)
    lines = json.dumps(document, indent=1).replace("\n   ", " ").replace("\n  ]", " ]")
    arguments.points_file.write_text(lines + "\n", encoding="utf-8")
    print(f"{len(document['banks'])} points; without an organization: {rows.count(None)}")


if __name__ == "__main__":
    main()
