# SPDX-License-Identifier: GPL-2.0-or-later
"""What others' tools print, read; what is recorded and what is not: data/tools/README.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nearmetal.core.errors import MeasurementError
from nearmetal.measure.tools import cuda_p2p, nccl, nvbandwidth, perftest
from nearmetal.measure.tools.reading import Reading

DATA = Path(__file__).parent / "data" / "tools"


def sample(name: str) -> str:
    return (DATA / name).read_text()


def only(readings: tuple[Reading, ...], **context: str) -> Reading:
    """The one reading with that context."""
    (found,) = [one for one in readings if context.items() <= one.context.items()]
    return found


# --- perftest, recorded ----------------------------------------------------------------------


@pytest.mark.parametrize(("version", "gbits"), [("4.5", 0.16), ("25.01", 0.18)])
def test_perftest_one_size(version: str, gbits: float) -> None:
    name = f"perftest-{version}-one-size-write"
    (reading,) = perftest.parse(sample(f"{name}.out"), sample(f"{name}.json"))
    assert reading.quantity == "bandwidth"
    assert reading.value == pytest.approx(gbits / 8)
    assert reading.context == {
        "test": "RDMA_Write",
        "size": "65536",
        "tool_relaxed_ordering": "on",
    }


@pytest.mark.parametrize("version", ["4.5", "25.01"])
def test_perftest_unit_is_read_from_its_table(version: str) -> None:
    """Without --report_gbits it is MiB/sec, in 4.5 MB/sec: the message rate has no such unit."""
    name = f"perftest-{version}-one-size-mib"
    (reading,) = perftest.parse(sample(f"{name}.out"), sample(f"{name}.json"))
    rate = float(perftest.results(sample(f"{name}.json"))["MsgRate"]) * 1e6
    assert reading.value == pytest.approx(65536 * rate / 1e9, rel=0.01)


@pytest.mark.parametrize("version", ["4.5", "25.01"])
def test_perftest_all_sizes_are_in_the_table_alone(version: str) -> None:
    """The file holds the last of 23 sizes."""
    name = f"perftest-{version}-all-sizes-read"
    readings = perftest.parse(sample(f"{name}.out"), sample(f"{name}.json"))
    assert [one.context["size"] for one in readings] == [str(2**n) for n in range(1, 24)]
    assert {one.context["test"] for one in readings} == {"RDMA_Read"}
    assert perftest.results(sample(f"{name}.json"))["MsgSize"] == str(1 << 23)


def test_perftest_server_has_the_last_size_alone() -> None:
    readings = perftest.parse(sample("perftest-25.01-all-sizes-read-server.out"))
    assert [one.context["size"] for one in readings] == [str(1 << 23)]


@pytest.mark.parametrize("version", ["4.5", "25.01"])
@pytest.mark.parametrize("label", ["duration", "bidirectional"])
def test_perftest_other_forms(version: str, label: str) -> None:
    name = f"perftest-{version}-{label}"
    (reading,) = perftest.parse(sample(f"{name}.out"), sample(f"{name}.json"))
    assert reading.value > 0
    bidirectional = label == "bidirectional"
    assert reading.context["test"] == "RDMA_Write" + ("_Bidirectional" if bidirectional else "")


@pytest.mark.parametrize(
    ("name", "says", "mend"),
    [
        ("25.01-cuda", "Unsupported memory type", "built without CUDA"),
        ("4.5-cuda", "unrecognized option '--use_cuda=0'", "CUDA_H_PATH"),
        ("25.01-no-server", "Couldn't connect to 10.9.0.1:18515", "firewall"),
        ("4.5-no-server", "Couldn't connect to 10.9.0.1:18515", "firewall"),
        ("25.01-no-device", "Unable to find the Infiniband/RoCE device", "ibv_devices"),
        ("4.5-no-device", "Unable to find the Infiniband/RoCE device", "ibv_devices"),
        ("no-mr", "Couldn't allocate MR", "modprobe nvidia-peermem"),
        ("no-mr", "Couldn't allocate MR", "dmabuf: true"),
    ],
)
def test_perftest_says_what_went_wrong(name: str, says: str, mend: str) -> None:
    origin = "reduced-" if name == "no-mr" else ""
    with pytest.raises(MeasurementError) as caught:
        perftest.parse(sample(f"{origin}perftest-{name}.out"))
    assert says in caught.value.message
    assert "\n" not in caught.value.message
    assert mend in str(caught.value.hint)


@pytest.mark.parametrize(
    ("said", "mend"),
    [
        ("initializing CUDA\nCouldn't allocate MR with error=14\n", "nvidia-peermem"),
        ("initializing CUDA\n Unable to reg MR\n", "nvidia-peermem"),
        (
            "using DMA-BUF for GPU buffer address\nCouldn't allocate MR with error=95\n"
            "OFED stack does not support DMA-BUF\n",
            "open kernel modules",
        ),
        ("Couldn't allocate MR\nfailed to create mr\n", "ulimit -l"),
    ],
)
def test_perftest_that_could_not_register_memory(said: str, mend: str) -> None:
    failed = perftest.failure(said, "it ended with status 1", "vm1")
    assert "MR" in failed.message
    assert mend in str(failed.hint)


GOOD = "perftest-25.01-one-size-write"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("[Gb/sec]", "[GiB/sec]", "'GiB/sec' is not a known unit"),
        ("BW average[Gb/sec]", "BW average[MiB/sec]", "not a known unit"),
        ("[Gb/sec]", "[MiB/sec]", "GB/s, and 0.021889 by its rate"),
        ("0.18 ", "nan ", "is nan"),
        ("0.18 ", "fast ", "and no number"),
        ("0.32               0.18   \t\t     0.000334", "", "is empty"),
        ("0.32               0.18   \t\t     0.000334", "0.00 0.00 0.000000", "nothing was"),
    ],
)
def test_perftest_tables_that_are_refused(old: str, new: str, says: str) -> None:
    text = sample(f"{GOOD}.out")
    assert old in text
    with pytest.raises(MeasurementError, match=says):
        perftest.parse(text.replace(old, new))


def test_perftest_files_that_are_refused() -> None:
    table, document = sample(f"{GOOD}.out"), sample(f"{GOOD}.json")
    for text, says in (
        ("", "is empty"),
        (document[: document.index('"MsgRate"')], "ends early"),
        (document.replace('"BW_average"', '"t_avg"'), "has no BW_average"),
        (document.replace("0.18", "0.19"), "says 0.19 for 65536 bytes, and its table 0.18"),
        (document.replace("65536", "4096"), "for 4096 bytes"),
    ):
        with pytest.raises(MeasurementError, match=says):
            perftest.parse(table, text)
    with pytest.raises(MeasurementError, match="no table"):
        perftest.parse("")


# --- nvbandwidth, from its source ------------------------------------------------------------

MATRIX = "from-source-nvbandwidth.json"


def changed(name: str, **changes: Any) -> str:
    """A sample with other values in its first test."""
    document = json.loads(sample(name))
    document["nvbandwidth"]["testcases"][0].update(changes)
    return json.dumps(document)


def test_nvbandwidth() -> None:
    readings = nvbandwidth.parse(sample(MATRIX))
    write = {"test": "device_to_device_memcpy_write_ce"}
    assert only(readings, **write, row="0", column="1").value == 24.5831
    latency = only(readings, test="device_to_device_latency_sm", row="1", column="0")
    assert latency.quantity == "latency"
    assert latency.value == pytest.approx(1.8401)
    assert len(readings) == 6


def test_nvbandwidth_of_three_matrices_in_one_the_total_is_read() -> None:
    readings = nvbandwidth.parse(sample(MATRIX))
    both = {"test": "device_to_device_bidirectional_memcpy_read_ce"}
    assert only(readings, **both, row="0", column="1").value == 25.401
    assert only(readings, **both, row="1", column="0").value == 25.6014


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        ("Segmentation fault", "not complete JSON"),
        (sample("reduced-nvbandwidth-text-v0.2.out"), "v0.2 printed text, and no JSON"),
        (sample("reduced-nvbandwidth-text-v0.2.out")[50:], "it printed text, and no JSON"),
        (
            "nvbandwidth Version: v0.4\nERROR: Invalid Arguments \n-j -t 3\n",
            "v0.4 printed text, and no JSON",
        ),
        (sample(MATRIX)[:-30], "not complete JSON"),
        ("[]", "not complete JSON|not an object"),
        ("{}", "has no 'nvbandwidth'"),
        ('{"nvbandwidth": {"testcases": ["x"]}}', "invalid tests"),
        ('{"nvbandwidth": {"testcases": {"x": 1}}}', "invalid tests"),
        ('{"nvbandwidth": {"version": "v0.8"}}', "no results of any test"),
        (sample("from-source-nvbandwidth-error.json"), "CUDA_ERROR_NO_DEVICE"),
        (sample("from-source-nvbandwidth-waived.json"), "Waived"),
        (changed(MATRIX, status="Running"), "Running"),
        (changed(MATRIX, bandwidth_matrix=[["N/A", "N/A"], ["N/A", "N/A"]], sum=0), "no pair"),
        (changed(MATRIX, bandwidth_matrix=[["N/A"], ["N/A", "1"]]), "no matrix"),
        (changed(MATRIX, bandwidth_matrix=[]), "no matrix"),
        (changed(MATRIX, bandwidth_description="Bisect benchmarking"), "no known unit"),
        (changed(MATRIX, bandwidth_description="bandwidth (GiB/s)"), "no known unit"),
        (changed(MATRIX, sum=1000.0), "the sum of its cells is not 1000"),
        (changed(MATRIX, bandwidth_matrix=[["N/A", "inf"], ["1", "N/A"]]), "is inf"),
        (changed(MATRIX, bandwidth_matrix=[["N/A", "n/a"], ["1", "N/A"]]), "no number"),
    ],
)
def test_nvbandwidth_that_is_refused(text: str, says: str) -> None:
    with pytest.raises(MeasurementError, match=says) as caught:
        nvbandwidth.parse(text)
    assert "\n" not in caught.value.message


def test_nvbandwidth_wants_the_tests_that_were_asked_for() -> None:
    with pytest.raises(MeasurementError, match="no results of device_local_copy"):
        nvbandwidth.parse(sample(MATRIX), ["device_local_copy"])


def test_nvbandwidth_behind_words_of_a_library() -> None:
    assert nvbandwidth.parse("a warning of a library\n" + sample(MATRIX))


# --- p2pBandwidthLatencyTest, from its source ------------------------------------------------

PAIRS = "from-source-p2pBandwidthLatencyTest.out"


def test_pairs_without_access_are_told_from_peers() -> None:
    readings = cuda_p2p.parse(sample(PAIRS))
    write = {"test": "unidirectional-write", "p2p": "enabled"}
    assert only(readings, **write, row="0", column="1").context["access"] == "peer"
    assert only(readings, **write, row="0", column="1").value == 24.1
    assert only(readings, **write, row="0", column="2").context["access"] == "host"
    off = only(readings, test="bidirectional", p2p="disabled", row="0", column="1")
    assert (off.context["access"], off.value) == ("host", 16.1)
    latency = only(readings, test="latency-write", p2p="enabled", row="1", column="0")
    assert (latency.quantity, latency.value) == ("latency", 3.5)
    assert not [one for one in readings if one.context["row"] == one.context["column"]]
    assert len(readings) == 6 * 6


@pytest.mark.parametrize("origin", ["from-source", "reduced"])
def test_gpus_without_access_give_the_baseline(origin: str) -> None:
    """What a VM without peer access gets: by way of the host's memory, said once."""
    readings = cuda_p2p.parse(sample(f"{origin}-p2pBandwidthLatencyTest-no-access.out"))
    assert {(one.context["access"], one.context["p2p"]) for one in readings} == {
        ("host", "disabled")
    }
    assert [one.context["test"] for one in readings[::2]] == [
        "unidirectional-write",
        "bidirectional",
        "latency-write",
    ]
    first, second = (11.1, 12.0) if origin == "from-source" else (9.5, 9.6)
    write = {"test": "unidirectional-write"}
    assert only(readings, **write, row="0", column="1").value == first
    assert only(readings, **write, row="1", column="0").value == second


def test_gpus_without_access_and_a_test_that_broke_off() -> None:
    text = sample("reduced-p2pBandwidthLatencyTest-no-access.out")
    with pytest.raises(MeasurementError, match="ends before latency"):
        cuda_p2p.parse(text[: text.index("P2P=Enabled Latency")])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no two GPUs"),
        (
            sample(PAIRS).replace(
                "Bidirectional P2P=Enabled", "Cuda failure p2p.cu:9: 'out of memory'\n"
            ),
            "out of memory",
        ),
        (sample(PAIRS)[: sample(PAIRS).index("Bidirectional P2P=Enabled")], "ends before bidir"),
        (sample(PAIRS)[: sample(PAIRS).index("P2P=Disabled Latency")], "ends before latency"),
        (sample(PAIRS)[: sample(PAIRS).index("Bidirectional P2P=Disabled") - 20], "is incomplete"),
        (
            sample(PAIRS).replace("(P2P Writes) Matrix (GB/s)", "(P2P Writes) Matrix (MB/s)"),
            "is not a unit",
        ),
        (sample(PAIRS).replace(" 24.10", "   nan"), "is nan"),
    ],
)
def test_p2p_test_that_is_refused(text: str, says: str) -> None:
    with pytest.raises(MeasurementError, match=says) as caught:
        cuda_p2p.parse(text)
    assert "\n" not in caught.value.message


# --- nccl-tests, from their source -----------------------------------------------------------

RESULTS = "from-source-nccl-tests-version-3.json"
TABLE = "from-source-nccl-tests-table.out"


@pytest.mark.parametrize("name", [RESULTS, "from-source-nccl-tests-version-1.json", TABLE])
def test_nccl(name: str) -> None:
    text = sample(name)
    parsed = nccl.parse_table(text, "all_reduce_perf") if name == TABLE else nccl.parse(text)
    assert [one.value for one in parsed] == [22.57, 22.61, 40.1, 40.3]
    assert parsed[-1].context == {
        "test": "all_reduce_perf",
        "size": "4194304",
        "type": "float",
        "redop": "sum",
        "place": "in",
    }


def with_(**changes: Any) -> str:
    return json.dumps({**json.loads(sample(RESULTS)), **changes})


def wrong(value: Any) -> str:
    document = json.loads(sample(RESULTS))
    document["results"][1]["in_place"]["nwrong"] = value
    return json.dumps(document)


def of_each(**changes: Any) -> str:
    document = json.loads(sample(RESULTS))
    for result in document["results"]:
        result.update(changes)
    return json.dumps(document)


def test_nccl_file_without_results_of_no_bytes() -> None:
    document = json.loads(sample(RESULTS))
    nothing = {**document["results"][0], "size": 0, "count": 0}
    document["results"] = [nothing, nothing, *document["results"]]
    assert nccl.parse(json.dumps(document)) == nccl.parse(sample(RESULTS))


def test_nccl_file_of_several_processes_of_one_rank() -> None:
    two = {"nthreads": 1, "ngpus": 1, "devices": [{"rank": 0}, {"rank": 1}]}
    assert nccl.parse(with_(config=two)) == nccl.parse(sample(RESULTS))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        (sample(RESULTS)[:-200], "not complete JSON"),
        (with_(version=4), "version 4; known are 1 to 3"),
        (with_(version=None), "version None"),
        (with_(results=[]), "no results"),
        (with_(results=[None]), "invalid results"),
        (of_each(in_place=None, out_of_place=3), "has no results"),
        (json.dumps({"version": 3, "results": [{}]}), "did not end"),
        (with_(errors=["unhandled cuda error\nsecond line"]), "unhandled cuda error second"),
        (with_(out_of_bounds={"count": 3, "okay": "false"}), "the data was wrong"),
        (with_(out_of_bounds=None), "the data was wrong"),
        (with_(config={"nthreads": 1, "ngpus": 1, "devices": [{"rank": 0}]}), "a single rank"),
        (of_each(size=0), "all its results are of 0 bytes"),
        (of_each(size=64), "64 bytes come twice in one run"),
        (of_each(size=None), "'None' is not a size"),
        (wrong(7.0), "7.0 elements of 4194304 bytes were wrong"),
        (wrong("nan"), "is nan"),
    ],
)
def test_nccl_file_that_is_refused(text: str, says: str) -> None:
    with pytest.raises(MeasurementError, match=says) as caught:
        nccl.parse(text)
    assert "\n" not in caught.value.message


def test_nccl_environment_is_not_kept() -> None:
    kept = nccl.without_environment(sample(RESULTS))
    assert "SECRET_TOKEN" not in kept
    assert nccl.parse(kept) == nccl.parse(sample(RESULTS))


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("(GB/s)", "(MB/s)", "other units"),
        ("busbw", "speed", "other columns"),
        ("values : 0 OK", "values : 5 FAILED", "5 values out of bounds"),
        ("# Out of bounds", "# killed", "ends early"),
        (" 22.61       0", " 22.61       3", "3 elements of 1048576 bytes were wrong"),
        (" 22.61       0", " 22.61", "is incomplete"),
        (" 22.61       0", "   nan       0", "is nan"),
    ],
)
def test_nccl_table_that_is_refused(old: str, new: str, says: str) -> None:
    text = sample(TABLE)
    assert old in text
    with pytest.raises(MeasurementError, match=says):
        nccl.parse_table(text.replace(old, new), "all_reduce_perf")


def table(kind: str) -> tuple[Reading, ...]:
    return nccl.parse_table(sample(f"reduced-nccl-{kind}.out"), "/opt/all_gather_perf")


def figures(readings: tuple[Reading, ...]) -> list[tuple[str, str, float]]:
    return [(one.context["size"], one.context["redop"], one.value) for one in readings]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("alltoall-blank-redop", [("16777216", "none", 10.49)] * 2),
        ("error-column", [("33554432", "sum", 1.68)] * 2 + [("67108864", "sum", 1.68)] * 2),
        ("size-zero-twice", [("32", "none", 0.0)] * 2 + [("16777216", "none", 10.49)] * 2),
        (
            "tagged-by-mpirun",
            [("8388608", "sum", 83.89)] * 2 + [("536870912", "sum", 134.22)] * 2,
        ),
    ],
)
def test_nccl_tables_of_other_kinds(kind: str, expected: list[tuple[str, str, float]]) -> None:
    found = table(kind)
    assert figures(found) == expected
    assert [one.context["place"] for one in found[:2]] == ["out", "in"]
    assert {one.context["test"] for one in found} == {"all_gather_perf"}
    assert len({tuple(one.context.items()) for one in found}) == len(found)


TWO = sample(TABLE)
ROW = next(line for line in TWO.splitlines() if line.startswith("     4194304"))
TAGS = (
    "[1,0]<stdout>:",
    "[1,0]<stdout>: ",
    "[prterun-node1-4242@1,0]<stdout>: ",
    "[prterun-node1-4242@1,0][node1:4242]<stdout>: ",
    "Mon Nov 30 22:01:48 2026[1,0]<stdout>:",
    "0: ",
    "[0] ",
    "launcher-7f9c: ",
)


@pytest.mark.parametrize("tag", TAGS)
def test_nccl_tags(tag: str) -> None:
    tagged = "".join(f"{tag}{line}\n" for line in TWO.splitlines())
    other = tag.replace("0", "1") + "node2:99:99 [0] NCCL INFO Using network IB\n"
    for text in (tagged, tagged.replace(tag + ROW, other + tag + ROW)):
        assert nccl.parse_table(text, "x") == nccl.parse_table(TWO, "x")


def test_nccl_tag_in_the_middle_of_a_row() -> None:
    tag = "[1,0]<stdout>:"
    text = TWO.replace("sum      -1    104.6", f"sum      -1{tag}    104.6")
    assert nccl.parse_table(text, "x") == nccl.parse_table(TWO, "x")


INFO = "node1:4242:4250 [1] NCCL INFO comm 0x55d0 rank 1 nranks 2 busId 18000 - Init COMPLETE"


def test_nccl_log_between_rows_is_passed_over() -> None:
    text = TWO.replace(ROW, f"{INFO}\n\n10.0.0.1:4242:4242 [0] NCCL INFO x\n{ROW}")
    assert nccl.parse_table(text, "x") == nccl.parse_table(TWO, "x")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (TWO.replace(ROW, INFO + ROW), "runs into other output"),
        (TWO.replace(ROW, f"{INFO} {ROW}"), "runs into other output"),
        (TWO.replace(ROW, ROW + INFO), "is incomplete"),
        (TWO.replace(ROW, f"{ROW} {INFO}"), "is incomplete"),
        (TWO.replace(ROW, f"{ROW[:50]}{INFO}{ROW[50:]}"), "is incomplete"),
        (TWO.replace(ROW, f"{ROW[:52]}{INFO}\n{ROW[52:]}"), "is incomplete"),
        (TWO.replace(ROW, f"{INFO}{ROW[:52]}\n{ROW[52:]}"), "runs into other output"),
        # the rest was lost, too: the average tells
        (TWO.replace(ROW, INFO + ROW[:52]), "by its rows: one got lost"),
    ],
)
def test_nccl_row_that_is_glued_to_a_log_is_an_error(text: str, says: str) -> None:
    assert text != TWO
    with pytest.raises(MeasurementError, match=says):
        nccl.parse_table(text, "x")


def test_nccl_columns_of_newer_and_other_forms() -> None:
    """Time stamps, CPU time, statistics of iterations: 2.19.6, util.cu."""
    stamped = []
    for line in TWO.splitlines():
        if "size" in line:
            line = line.rstrip().replace("   time", "cputime") + "           timestamp"
        elif line.startswith("     "):
            line += "  2026-07-10 12:00:01"
        stamped.append(line)
    assert nccl.parse_table("\n".join(stamped), "x") == nccl.parse_table(TWO, "x")
    statistics = []
    for line in TWO.splitlines():
        words = line.split()
        if "size" in line:
            more = "i_min   i_max   i_p99   i_cv%"
            line = f"# size count type redop root time algbw busbw #wrong {more}"
            line += f" time algbw busbw #wrong {more}"
        elif line.startswith("     "):
            more_words = ["1.00", "2.00", "2.00", "0.50"]
            line = " ".join([*words[:9], *more_words, *words[9:], *more_words])
        statistics.append(line)
    assert nccl.parse_table("\n".join(statistics), "x") == nccl.parse_table(TWO, "x")


def test_nccl_old_tables_without_redop_or_with_a_root() -> None:
    """2.10: all_gather.cu and broadcast.cu."""
    half, speeds = "   time   algbw   busbw  error", "   (us)  (GB/s)  (GB/s)       "
    head = f"#       size         count      type  {half}  {half}"
    units = f"#        (B)    (elements)            {speeds}  {speeds}"
    row = "    33554432       8388608     float" + "    20000    1.68    1.68  2e-07" * 2
    end = "# Out of bounds values : 0 OK\n# Avg bus bandwidth    : 1.68"
    found = nccl.parse_table("\n".join((head, units, row, end)), "all_gather_perf")
    assert figures(found) == [("33554432", "none", 1.68)] * 2
    rooted = [line.replace("type", "type    root", 1) for line in (head,)]
    rows = [row.replace("float", f"float       {root}") for root in (0, 1)]
    found = nccl.parse_table("\n".join((*rooted, units, *rows, end)), "broadcast_perf")
    assert [one.context["root"] for one in found] == ["0", "0", "1", "1"]


def test_nccl_of_one_rank_is_refused() -> None:
    with pytest.raises(MeasurementError, match="a single rank") as caught:
        table("one-rank")
    assert "'gpus'" in str(caught.value.hint)
    assert "MPI=1" in str(caught.value.hint)
    text = sample("reduced-nccl-one-rank.out")
    lines = [line for line in text.splitlines(keepends=True) if "Rank" not in line]
    with pytest.raises(MeasurementError, match="a single rank"):
        nccl.parse_table("".join(lines), "x")
    # a broadcast of one rank has a bus bandwidth
    with pytest.raises(MeasurementError, match="a single rank"):
        nccl.parse_table(text.replace("    0.00      0     0.50", "  262.14      0     0.50"), "x")


def test_nccl_of_processes_that_know_nothing_of_each_other() -> None:
    with pytest.raises(MeasurementError, match="printed 2 tables") as caught:
        nccl.parse_table(TWO + TWO, "x")
    assert "MPI=1" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("2e-07", "nan", "is nan"),
        ("0 OK", "3 FAILED", "3 values out of bounds"),
        ("error     time", "speed     time", "other columns"),
        ("  2e-07    20000", "    20000", "is incomplete"),
    ],
)
def test_nccl_old_table_that_is_refused(old: str, new: str, says: str) -> None:
    text = sample("reduced-nccl-error-column.out")
    assert old in text
    with pytest.raises(MeasurementError, match=says):
        nccl.parse_table(text.replace(old, new, 1), "x")


def test_nccl_row_that_lacks_a_cell_is_not_one_with_a_blank() -> None:
    text = sample("reduced-nccl-alltoall-blank-redop.out")
    for old in ("   20.97", "   10.49    N/A", "  2097152", "    float"):
        assert old in text
        with pytest.raises(MeasurementError, match=r"is incomplete|not a number"):
            nccl.parse_table(text.replace(old, "", 1), "x")


def test_nccl_sizes_that_are_rounded_to_the_same() -> None:
    text = TWO.replace("     4194304       1048576", "     1048576        262144")
    with pytest.raises(MeasurementError, match="1048576 bytes come twice"):
        nccl.parse_table(text, "x")
    with pytest.raises(MeasurementError, match="all its results are of 0 bytes"):
        nccl.parse_table(TWO.replace("4194304 ", "0 ").replace("     1048576 ", "     0 "), "x")


def test_nccl_failure_is_told_by_the_warning_below_its_log() -> None:
    with pytest.raises(MeasurementError) as caught:
        table("info-then-failure")
    assert "NCCL WARN Cuda failure 'peer access is not supported" in caught.value.message
    text = sample("reduced-nccl-info-then-failure.out")
    lines = [line for line in text.splitlines(keepends=True) if "WARN" not in line]
    with pytest.raises(MeasurementError, match=r"Test NCCL failure common\.cu:958"):
        nccl.parse_table("".join(lines), "x")
    logged = "node1:1:1 [0] NCCL INFO failure of x: error 3\n" + "".join(lines)
    with pytest.raises(MeasurementError) as caught:
        nccl.parse_table(logged, "x")
    assert "Test NCCL failure common.cu:958" in caught.value.message
    # after some rows
    begun = TWO[: TWO.index("# Out of bounds")] + text
    with pytest.raises(MeasurementError, match="NCCL WARN Cuda failure"):
        nccl.parse_table(begun, "x")


def test_nccl_says_what_went_wrong() -> None:
    said = (
        "vm1: Test NCCL failure common.cu:1310 'unhandled cuda error "
        "(run with NCCL_DEBUG=INFO for details) / '\n .. vm1 pid 71: Test failure common.cu:1087\n"
    )
    with pytest.raises(MeasurementError, match="unhandled cuda error"):
        nccl.parse_table(said, "all_reduce_perf")
    with pytest.raises(MeasurementError, match="printed no table"):
        nccl.parse_table("", "all_reduce_perf")
    died = (
        "mpirun noticed that process rank 3 with PID 7 on node node2 exited on signal 9 (Killed)."
    )
    with pytest.raises(MeasurementError, match="exited on signal 9"):
        nccl.parse_table(f"{INFO}\n{died}\n", "all_reduce_perf")
