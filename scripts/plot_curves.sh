#!/usr/bin/env bash
# Learning curves as an SVG on standard output, from the metrics.jsonl of runs:
#
#   scripts/plot_curves.sh TEACHER_RUN NAME=RUN_DIR...    a dashed line at the last held-out loss of TEACHER_RUN; '' for none. All on the same rows.
#
#   CURVE=kd      the divergence from the teacher in place of cross entropy
#   FROM=0.15     the curves from this share of the steps on: without the fall at the beginning their ends can be told apart
#
# Solid: cross entropy on held-out rows. Faint: on the rows being learnt, averaged over 1/40 of the run. Eight colours, then again, dashed.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
teacher_run=$1 teacher= curve=${CURVE:-ce}
case $curve in ce | kd) ;; *) echo "plot_curves: CURVE=$curve: ce or kd" >&2; exit 2 ;; esac
shift
[ -z "$teacher_run" ] || teacher=$(sed -n 's|.*"heldout/'"$curve"'": \([0-9.]*\).*|\1|p' "$teacher_run/metrics.jsonl" | tail -n1)
for run in "$@"; do
    name=${run%%=*} file=${run#*=}/metrics.jsonl
    [ -s "$file" ] || { echo "plot_curves: $file: not there or empty" >&2; exit 4; }
    sed "s/^/$name /" "$file"
done | awk -v teacher="$teacher" -v curve="$curve" -v from="${FROM:-0}" '
    function value(key,    at, rest) {                 # of "key": number in this line; "" where there is none
        at = index($0, "\"" key "\": ")
        if (!at) return ""
        rest = substr($0, at + length(key) + 4)
        match(rest, /^[-+.eE0-9]+/)
        if (RLENGTH <= 0) return ""                    # null
        return substr(rest, 1, RLENGTH) + 0
    }
    function see(y) { if (!seen++ || y < low) low = y; if (seen == 1 || y > high) high = y }
    function X(step) { return left + (width - left - right) * step / last }
    function Y(loss) { return loss > high ? top : top + (height - top - bottom) * (high - loss) / (high - low) }
    function text(x, y, anchor, words, colour) {
        printf "<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"%s\" fill=\"%s\">%s</text>\n", x, y, anchor, colour, words
    }
    {
        name = $1
        if (!(name in number)) { number[name] = ++runs; title[runs] = name }
        r = number[name]; step = value("step")
        if (step > last) last = step
        if ((y = value("train/" curve)) != "") { n = ++trains[r]; train_step[r, n] = step; train[r, n] = y }
        if ((y = value("heldout/" curve)) != "") { n = ++helds[r]; held_step[r, n] = step; held[r, n] = y }
    }
    END {
        width = 860; height = 480; left = 70; right = 30; top = 50; bottom = 60
        colours = split("#1f6feb #d9480f #2b8a3e #7048e8 #0c8599 #c2255c #846358 #e67700", colour, " ")
        for (r = 1; r <= runs; r++) for (i = 1; i <= helds[r]; i++) if (held_step[r, i] >= from * last) see(held[r, i])
        if (teacher != "") see(teacher + 0)
        for (r = 1; r <= runs; r++) {                  # running means of the training loss
            window = int(trains[r] / 40) + 1; sum = 0; points[r] = 0
            for (i = 1; i <= trains[r]; i++) {
                sum += train[r, i]
                if (i % window == 0) { n = ++points[r]; mean[r, n] = sum / window; mean_step[r, n] = train_step[r, i]; sum = 0; if (train_step[r, i] > (from > 0.2 ? from : 0.2) * last) see(mean[r, n]) }
            }
        }
        if (!seen || !last) { print "plot_curves: there is no loss in these runs" > "/dev/stderr"; exit 3 }
        pad = (high - low) * 0.05 + 0.01; low -= pad; high += pad
        printf "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%d\" viewBox=\"0 0 %d %d\" font-family=\"sans-serif\" font-size=\"13\">\n", width, height, width, height
        print "<rect width=\"100%\" height=\"100%\" fill=\"white\"/>"
        text(left, 24, "start", (curve == "kd" ? "Held-out divergence from the teacher" : "Held-out cross entropy") ", nats per token (faint: on the rows being learnt)", "#222")
        tick = 0.01; if (high - low > 0.15) tick = 0.02; if (high - low > 0.3) tick = 0.05; if (high - low > 0.6) tick = 0.1; if (high - low > 1.2) tick = 0.2; if (high - low > 2.5) tick = 0.5; if (high - low > 6) tick = 1
        for (y = int(low / tick) * tick; y <= high; y += tick) if (y >= low) {
            printf "<line x1=\"%d\" x2=\"%d\" y1=\"%.1f\" y2=\"%.1f\" stroke=\"#e4e4e4\"/>\n", left, width - right, Y(y), Y(y)
            text(left - 8, Y(y) + 4, "end", sprintf("%.2f", y), "#444")
        }
        step = 1; while (last / step > 10) step *= (substr(step, 1, 1) == "2") ? 2.5 : 2
        for (x = 0; x <= last; x += step) text(X(x), height - bottom + 20, "middle", x, "#444")
        text((left + width - right) / 2, height - 14, "middle", "optimizer step", "#222")
        printf "<path d=\"M%d %dV%dH%d\" fill=\"none\" stroke=\"#444\"/>\n", left, top, height - bottom, width - right
        if (teacher != "") {
            printf "<line x1=\"%d\" x2=\"%d\" y1=\"%.1f\" y2=\"%.1f\" stroke=\"#222\" stroke-dasharray=\"6 4\"/>\n", left, width - right, Y(teacher), Y(teacher)
            text(left + 8, Y(teacher) - 6, "start", sprintf("teacher %.3f", teacher), "#222")
        }
        for (r = 1; r <= runs; r++) {
            dash = r > colours ? " stroke-dasharray=\"7 4\"" : ""; if (r > colours) colour[r] = colour[(r - 1) % colours + 1]
            printf "<polyline fill=\"none\" stroke=\"%s\" stroke-opacity=\"0.3\" points=\"", colour[r]
            for (i = 1; i <= points[r]; i++) printf "%.1f,%.1f ", X(mean_step[r, i]), Y(mean[r, i])
            printf "\"/>\n<polyline fill=\"none\" stroke=\"%s\" stroke-width=\"%s\"%s points=\"", colour[r], (runs > 4 ? "1.5" : "2.5"), dash
            for (i = 1; i <= helds[r]; i++) printf "%.1f,%.1f ", X(held_step[r, i]), Y(held[r, i])
            print "\"/>"
            text(width - right - 8, top + 18 * r, "end", title[r] (helds[r] ? sprintf(" %.3f", held[r, helds[r]]) : ""), colour[r])
        }
        print "</svg>"
    }'
