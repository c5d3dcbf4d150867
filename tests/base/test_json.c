/* json: what is refused, typed members with fallbacks, the canonical form and files. */
#include <criterion/criterion.h>
#include <math.h>
#include <string.h>

#include "base/error.h"
#include "base/file.h"
#include "base/json.h"

static json_t *parse(const char *text)
{
    json_t *root;
    cr_assert_eq(json_read_text(text, strlen(text), "test", &root), OK, "%s: %s", text, fail_message());
    return root;
}

Test(json, refused)
{
    static const char *const broken[] = {"", "{", "{\"a\":1,}", "{\"a\":1,\"a\":2}", "[1 2]", "{\"a\":01}", "\"\\u12\"", "nul", "{} x", "[1e999]", "{\"a\":\"\xff\"}",
                                         "99999999999999999999999"};
    for (size_t i = 0; i < sizeof broken / sizeof *broken; i++) {
        json_t *root = (json_t *)1;
        cr_assert_eq(json_read_text(broken[i], strlen(broken[i]), "name.json", &root), ERR_INPUT, "%s", broken[i]);
        cr_assert(root == NULL && !strncmp(fail_message(), "name.json: ", 11), "%s", fail_message());
    }
    json_t *root;
    cr_assert_eq(json_read_text("{}\0{}", 5, "nul", &root), ERR_INPUT);
    char *deep = xmalloc(200001);                                     /* nesting is bounded, not the stack */
    memset(deep, '[', 200000);
    deep[200000] = 0;
    cr_assert_eq(json_read_text(deep, 200000, "deep", &root), ERR_INPUT);
    free(deep);
}

Test(json, members)
{
    json_t *o = parse("{\"i\":-7,\"big\":9007199254740993,\"r\":2.5,\"whole\":3.0,\"huge\":1e300,\"t\":true,\"s\":\"x\",\"n\":null,\"a\":[]}");
    int64_t i;
    double d;
    bool b;
    const char *s;
    cr_assert(json_get_int(o, "i", "w", 1, &i) == OK && i == -7);
    cr_assert(json_get_int(o, "big", "w", 1, &i) == OK && i == 9007199254740993);
    cr_assert(json_get_int(o, "whole", "w", 1, &i) == OK && i == 3);  /* some writers print integers as reals */
    cr_assert(json_get_int(o, "n", "w", 5, &i) == OK && i == 5);
    cr_assert(json_get_int(o, "none", "w", 6, &i) == OK && i == 6);
    static const char *const not_int[] = {"r", "huge", "t", "s", "a"};
    for (int k = 0; k < 5; k++) {
        cr_assert_eq(json_get_int(o, not_int[k], "where", 1, &i), ERR_INPUT);
        cr_assert(strstr(fail_message(), "where") && strstr(fail_message(), not_int[k]));
    }
    cr_assert(json_get_double(o, "i", "w", 1, &d) == OK && d == -7);
    cr_assert(json_get_double(o, "r", "w", 1, &d) == OK && d == 2.5);
    cr_assert(json_get_double(o, "none", "w", 0.5, &d) == OK && d == 0.5);
    cr_assert_eq(json_get_double(o, "s", "w", 1, &d), ERR_INPUT);
    cr_assert(json_get_bool(o, "t", "w", false, &b) == OK && b);
    cr_assert(json_get_bool(o, "n", "w", true, &b) == OK && b);
    cr_assert_eq(json_get_bool(o, "i", "w", false, &b), ERR_INPUT);
    cr_assert(json_get_string(o, "s", "w", NULL, &s) == OK && !strcmp(s, "x"));
    cr_assert(json_get_string(o, "none", "w", NULL, &s) == OK && s == NULL);
    cr_assert_eq(json_get_string(o, "t", "w", NULL, &s), ERR_INPUT);
    json_decref(o);
}

Test(json, canonical_form)
{
    json_t *a = parse("{ \"b\": [1, 2.5, null], \"a\": {\"y\":true,\"x\":\"\\u00e9\"} }"), *b = parse("{\"a\":{\"x\":\"\xc3\xa9\",\"y\":true},\"b\":[1,2.5,null]}");
    char *ca = json_canonical(a), *cb = json_canonical(b);
    cr_assert_str_eq(ca, cb);
    cr_assert_str_eq(ca, "{\"a\":{\"x\":\"\xc3\xa9\",\"y\":true},\"b\":[1,2.5,null]}");
    free(ca); free(cb);
    json_decref(a);
    json_decref(b);
}

Test(json, files_keep_numbers)
{
    char dir[] = "/tmp/test_json_XXXXXX";
    cr_assert(mkdtemp(dir));
    char *path = path_join(dir, "x.json"), *text;
    size_t n;
    json_t *o = parse("{\"eps\":1e-06,\"third\":0.33333333333333331,\"n\":151936}"), *back;
    cr_assert_eq(json_write_file(path, o), OK);
    cr_assert_eq(json_read_file(path, 1000, &back), OK);
    cr_assert(json_equal(o, back));
    json_decref(back);
    cr_assert_eq(json_read_file(path, 10, &back), ERR_INPUT);
    json_object_del(o, "third");
    cr_assert_eq(json_write_file(path, o), OK);
    cr_assert_eq(file_read(path, 1000, &text, &n), OK);
    cr_assert(strstr(text, "1e-06") || strstr(text, "1e-6"), "%s", text);     /* as it was written, where 15 digits are enough */
    cr_assert_eq(text[n - 1], '\n');
    free(text);
    free(path);
    json_decref(o);
    cr_assert_eq(dir_remove_tree(dir), OK);
}

Test(json, values_in_messages)
{
    static const struct { const char *text; bool nothing; } cases[] = {{"null", true}, {"false", true}, {"{}", true}, {"[]", true}, {"true", false}, {"0", false}, {"\"\"", false}, {"[0]", false}};
    char text[80], *list = xasprintf("[%0200d]", 7);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        json_t *v;
        cr_assert_eq(json_read_text(cases[i].text, strlen(cases[i].text), "t", &v), OK);
        cr_expect_eq(json_says_nothing(v), cases[i].nothing, "%s", cases[i].text);
        cr_expect_str_eq(json_shown(v, text), cases[i].text);
        json_decref(v);
    }
    memset(list + 1, '1', 200);
    json_t *one = json_pack("[s]", list);
    cr_expect_eq(strlen(json_shown(one, text)), 79);
    cr_expect_str_eq(text + 76, "...");
    json_decref(one);
    free(list);
}
