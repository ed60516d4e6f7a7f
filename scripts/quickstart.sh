#!/usr/bin/env bash
# Certify 100 MNIST images with the committed vanilla RNN; prints the table and where the figures lie.
#
#   bash scripts/quickstart.sh [--train [--epochs N]] [flags of vanilla_rnn/bound_vanilla_rnn.py]
#
# --train first trains a model of its own into models/quickstart and certifies that one. Flags that belong to
# both, such as --data-dir and --hidden-size, reach both.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_environment.sh"

train=false
for_train=(--save-dir "$ROOT/models/quickstart")
for_bound=()
while (($#)); do
    pair=("$1")  # a flag with its value, which may follow it as a word of its own
    case "$1" in
        --data-dir | --hidden-size | --time-step | --activation | --seed | --device | --threads | --epochs)
            if (($# > 1)); then pair+=("$2"); shift; fi ;;
    esac
    case "${pair[0]}" in
        -h | --help) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;;
        --train) train=true ;;
        --epochs*) for_train+=("${pair[@]}") ;;
        --data-dir* | --hidden-size* | --time-step* | --activation* | --seed* | --device* | --threads* | --cuda)
            for_train+=("${pair[@]}"); for_bound+=("${pair[@]}") ;;
        *) for_bound+=("${pair[@]}") ;;
    esac
    shift
done

install_requirements requirements.txt

if $train; then
    "$PYTHON" "$ROOT/vanilla_rnn/train_rnn_mnist_classifier.py" "${for_train[@]}"
    for_bound+=(--work-dir "$ROOT/models/quickstart")
fi
exec "$PYTHON" "$ROOT/vanilla_rnn/bound_vanilla_rnn.py" ${for_bound[@]+"${for_bound[@]}"}
