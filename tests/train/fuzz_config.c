/* Fuzz target (libFuzzer): any bytes as a configuration file, or as a --set after the first byte '='.
 * What is accepted must be written as text that reads back and is written the same. */
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "train/config.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    struct config *c = config_new();
    int rc;
    if (bytes && data[0] == '=') {
        char *text = xstrndup((const char *)data + 1, bytes - 1);
        rc = config_set(c, text);
        free(text);
    } else rc = config_read_text(c, (const char *)data, bytes, "fuzz");
    CHECK(rc == OK || (rc == ERR_USAGE && *fail_message()), "status %d", rc);
    if (rc == OK) {
        struct config *back = config_new();
        char *first = config_to_yaml(c);
        CHECK(config_read_text(back, first, strlen(first), "written") == OK, "%s\n%s", fail_message(), first);
        char *second = config_to_yaml(back);
        CHECK(!strcmp(first, second), "%s\n%s", first, second);
        free(first);
        free(second);
        config_free(back);
    }
    config_free(c);
    return 0;
}
