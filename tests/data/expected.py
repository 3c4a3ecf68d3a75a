#!/usr/bin/env python3
"""Computes from three flights logs the tables that projections over them must arrive at.

usage: expected.py DIR

Reads flights.jsonl.zst, fleet.jsonl.zst and weather.jsonl.zst in DIR and writes into DIR/expected/:

  carrier_performance.csv  one row a registered airline, by carrier
  flight_board.csv.zst     one row a scheduled flight, by flight_id
  position.json            the last position of each source, counted from 0

It is no fold: it loads every event, indexes the events by type and key, then looks up each output row. So the order of events
plays no part; where several events could answer, the highest `sequence` of the stream does. An empty field is an unknown value.
Lines end in CR LF (RFC 4180), sorting is by code point. Needs the `zstd` command.
"""
import csv, io, json, os, subprocess, sys
from collections import defaultdict
from datetime import datetime

SOURCES = ("flights", "fleet", "weather")
STATUS = {
    "FlightScheduled": "scheduled",
    "FlightDeparted": "departed",
    "FlightArrived": "arrived",
    "FlightCancelled": "cancelled",
    "FlightDiverted": "diverted",
}


def load(path):
    """All events of one log as (type, sequence, data)."""
    with subprocess.Popen(["zstd", "-dcq", path], stdout=subprocess.PIPE) as zstd:
        events = [(e["type"], e["sequence"], e["data"]) for e in map(json.loads, zstd.stdout)]
    if zstd.returncode:
        sys.exit(f"zstd could not read {path}")
    if not events:
        sys.exit(f"no events in {path}")
    return events


def latest(events, type_, *key):
    """The data of the events of one type, by the values of `key`; the highest sequence wins."""
    best = {}
    for t, sequence, data in events:
        if t == type_:
            k = tuple(data[name] for name in key) if len(key) > 1 else data[key[0]]
            if k not in best or sequence > best[k][0]:
                best[k] = (sequence, data)
    return {k: data for k, (_, data) in best.items()}


def parse(time):
    return datetime.strptime(time, "%Y-%m-%dT%H:%M:%SZ")


def real(number):
    """The shortest text that reads back as the same float; the JSON number 0 is the float 0.0."""
    return "" if number is None else repr(float(number))


def table(header, rows):
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    writer.writerow(header.split(","))
    writer.writerows(rows)
    return out.getvalue().encode()


def main(directory):
    events = {s: load(os.path.join(directory, f"{s}.jsonl.zst")) for s in SOURCES}

    airlines = latest(events["fleet"], "AirlineRegistered", "carrier")
    aircraft = latest(events["fleet"], "AircraftRegistered", "tailnum")
    weather = latest(events["weather"], "WeatherObserved", "airport", "observed_at")
    scheduled = latest(events["flights"], "FlightScheduled", "flight_id")
    departed = latest(events["flights"], "FlightDeparted", "flight_id")
    arrived = latest(events["flights"], "FlightArrived", "flight_id")
    cancelled = latest(events["flights"], "FlightCancelled", "flight_id")
    diverted = latest(events["flights"], "FlightDiverted", "flight_id")

    last = {}  # flight_id -> (sequence, type) of its latest event
    for type_, sequence, data in events["flights"]:
        last[data["flight_id"]] = max(last.get(data["flight_id"], (0, "")), (sequence, type_))

    # What the tables take for granted; a log that breaks it needs another definition, not a guess.
    unscheduled = last.keys() - scheduled.keys()
    unregistered = {f["carrier"] for f in scheduled.values()} - airlines.keys()
    if unscheduled or unregistered:
        sys.exit(f"flights never scheduled: {len(unscheduled)}; carriers never registered: {sorted(unregistered)}")

    fleet_of = defaultdict(set)  # carrier -> its flight_ids
    for flight_id, flight in scheduled.items():
        fleet_of[flight["carrier"]].add(flight_id)

    performance = []
    for carrier in sorted(airlines):
        ids = fleet_of[carrier]
        performance.append([
            carrier,
            airlines[carrier]["name"],
            len(ids),
            len(ids & departed.keys()),
            len(ids & cancelled.keys()),
            len(ids & arrived.keys()),
            len(ids & diverted.keys()),
            sum(departed[i]["dep_delay"] for i in ids & departed.keys()),
            sum(arrived[i]["arr_delay"] for i in ids & arrived.keys()),
        ])

    board = []
    for flight_id in sorted(scheduled):
        flight = scheduled[flight_id]
        due = parse(flight["departs_at"])
        hour = due.replace(minute=0, second=0).strftime("%Y-%m-%dT%H:%M:%SZ")
        seen = weather.get((flight["origin"], hour), {})
        board.append([
            flight_id,
            flight["carrier"],
            airlines.get(flight["carrier"], {}).get("name"),
            flight["flight"],
            flight["tailnum"],
            aircraft.get(flight["tailnum"], {}).get("model"),
            flight["origin"],
            flight["dest"],
            STATUS[last[flight_id][1]],
            due.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            departed.get(flight_id, {}).get("dep_delay"),
            arrived.get(flight_id, {}).get("arr_delay"),
            real(seen.get("wind_speed")),
            real(seen.get("visib")),
            real(seen.get("precip")),
        ])

    out = os.path.join(directory, "expected")
    os.makedirs(out, exist_ok=True)
    with open(os.path.join(out, "carrier_performance.csv"), "wb") as f:
        f.write(table("carrier,name,scheduled,departed,cancelled,arrived,diverted,dep_delay_sum,arr_delay_sum", performance))
    content = table("flight_id,carrier,airline,flight,tailnum,aircraft,origin,dest,status,departs_at,dep_delay,arr_delay,"
                    "wind_speed,visibility,precipitation", board)
    subprocess.run(["zstd", "-19", "-qf", f"--stream-size={len(content)}", "-o", os.path.join(out, "flight_board.csv.zst")],
                   input=content, check=True)
    with open(os.path.join(out, "position.json"), "w", newline="\n") as f:
        f.write(json.dumps({s: len(events[s]) - 1 for s in SOURCES}) + "\n")
    print("carrier_performance", len(performance))
    print("flight_board", len(board))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
