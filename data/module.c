/* empty until the first file */ typedef int data_module;
