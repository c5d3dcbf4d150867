/* What the sweep kills and starves: a small dump by the shard writer, as teacher-dump does it but without a teacher. fault_target DIR */
#include <stdio.h>

#include "tests/data/shard_fixture.h"

int main(int argc, char **argv)
{
    struct shard_manifest m = fixture_manifest(SHARD_HYBRID, 2, 1, 6, 40, 3);
    if (argc != 2) return ERR_USAGE;
    int rc = fixture_dump(argv[1], &m);
    if (rc != OK) fprintf(stderr, "%s\n", fail_message());
    return rc;
}
